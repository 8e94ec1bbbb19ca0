"""The code of commands that import heavy packages. A command imports it when it runs, so that `serve` starts fast."""
