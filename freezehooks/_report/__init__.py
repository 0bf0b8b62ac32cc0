"""Reports: status, tables, figures to log, and pictures."""
