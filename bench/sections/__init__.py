"""What the report says, by subject: each function a section of the seed document's tables."""
