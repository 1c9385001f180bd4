"""Where models come from, where they are kept, and what their headers say."""
