"""The command line: a file for each subcommand, each with its options and a `main`."""
