"""What each task brings to the commands: predict, bench."""
