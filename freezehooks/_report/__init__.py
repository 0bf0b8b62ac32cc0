"""For whom to see: status, tables, figures to log, pictures."""
