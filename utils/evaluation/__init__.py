"""Measuring what a checkpoint does: quality, speed, memory."""
