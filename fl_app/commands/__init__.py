"""The command `flowleak`: one file a group."""
