"""Where things run: sessions, storage, deployment. Knows no image and no tensor."""
