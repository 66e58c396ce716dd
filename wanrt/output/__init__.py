"""Frames to NV12 to encoder to file or stream."""
