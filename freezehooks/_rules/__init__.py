"""What is written: regions, patterns and rules, as text and in Python. No torch."""
