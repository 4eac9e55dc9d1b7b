"""`python -m flowleak`: the command `flowleak`."""

from fl_app.commands.main import main

if __name__ == "__main__":
    main()
