"""What every request cost: spans, records, figures."""
