"""The runtime type checker of the test run: beartype, with an int where a float is asked for (PEP 484 allows it)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
