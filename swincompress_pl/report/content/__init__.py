"""What a report says, whatever its form."""
