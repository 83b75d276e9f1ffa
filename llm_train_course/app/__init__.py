"Plumbing that is not taught: command line, run folders, data files, report, ledger, exercise checker."
