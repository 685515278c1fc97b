"""Hours of use in minutes: workers, servers that break, and callers who count."""
