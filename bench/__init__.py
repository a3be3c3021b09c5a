"""What was measured, and the pages that show it."""
