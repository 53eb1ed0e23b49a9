"""Tasks: what is trained and what is measured, alike for every optimizer."""
