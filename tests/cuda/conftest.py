"""With FASTCONV_TEST_GPU the kernels of these tests run on a GPU: see `hardware.py`."""

import hardware

if hardware.MODE:
    from hardware import (  # noqa: F401
        pytest_collection_modifyitems,
        pytest_runtest_logreport,
        pytest_runtest_logstart,
    )

    collect_ignore = hardware.NOT_FOR_GPUS
    hardware.take_over()
