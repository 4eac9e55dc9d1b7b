"""The folder of a run, and what is done with it afterwards."""
