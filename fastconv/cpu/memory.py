"""Arrays as tasks see them: an address, byte strides and sizes."""


def address(array):
    """Return where the first element is."""
    return array.__array_interface__["data"][0]


def layout_of(array, data_format):
    """Return (address, and the byte strides along N, C, D, H, W) of a lifted array."""
    n, *rest = array.strides
    channel, spatial = (rest[0], rest[1:]) if data_format == "channels_first" else (rest[-1], rest[:-1])
    return address(array), n, channel, *spatial


def extent_of(array, data_format):
    """Return D, H, W of a lifted array."""
    return array.shape[2:] if data_format == "channels_first" else array.shape[1:4]
