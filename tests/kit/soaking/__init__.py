"""Hours of use in minutes: workers, servers that break, and callers that count."""
