"""What has nothing to do with federated learning."""
