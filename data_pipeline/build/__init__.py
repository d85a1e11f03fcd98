"""Prepares text: writes a corpus to disk."""
