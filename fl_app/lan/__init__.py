"""The same app on several machines."""
