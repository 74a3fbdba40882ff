"""What people see: the page and its figures, and the text and JSON that commands print."""
