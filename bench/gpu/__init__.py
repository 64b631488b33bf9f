"""What runs on a GPU machine, and what is known without one."""
