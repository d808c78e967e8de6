"""What was measured, for people and for programs: pages, Markdown, JSON and CSV."""
