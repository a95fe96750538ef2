"""The study behind docs/results.md: it trains, evaluates and writes the page. What serving costs is not measured here."""
