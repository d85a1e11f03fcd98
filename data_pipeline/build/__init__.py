"""Text -> a prepared corpus on disk."""
