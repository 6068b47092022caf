"""The index of a dataset's images, and the endpoints over a trained model."""
