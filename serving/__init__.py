"""The endpoints over a trained model (arrives with `rayograph serve`)."""
