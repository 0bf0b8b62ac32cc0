"""What the project's own work needs and its users do not: checks of pins and of what is published."""
