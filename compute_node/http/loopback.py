"""Which names of hosts mean this one and nobody else."""

import ipaddress


def is_loopback(host: str) -> bool:
    """True when nobody else is reached, or can reach, by this name or address."""
    host = host.strip("[]").lower().removesuffix(".")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
