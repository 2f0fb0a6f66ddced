"""What a run says of itself: metrics, events, progress."""
