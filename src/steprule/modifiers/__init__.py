"""What can be added to any rule."""
