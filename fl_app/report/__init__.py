"""The report of a run, for whoever decides on it: folder -> collect -> render -> one HTML file."""
