"""Whether there is a number: what a row of results says of itself."""

OK, SKIPPED, FAILED = "ok", "skipped", "failed"
