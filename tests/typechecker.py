from beartype import BeartypeConf, beartype

# an int where a float is expected is fine, as everywhere in Python (PEP 484)
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
