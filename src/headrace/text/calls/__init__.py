"""How models write thinking and tool calls: found in their templates, parsed, enforced."""
