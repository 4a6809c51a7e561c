"""Documents from files, archives, folders and hubs, in bounded memory, with a ledger of faults."""
