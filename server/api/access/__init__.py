"""Who may do what: credentials, rights, quotas, and the files that say so."""
