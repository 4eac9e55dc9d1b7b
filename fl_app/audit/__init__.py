"""The auditor: the only place that may read a client's Truth."""
