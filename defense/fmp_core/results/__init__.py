"""Results on disk: what a run leaves (``run_folder``, ``bb_tables``), and what is made of the results of many.

``read`` reads one record's figures or one defense's result, :func:`collect.collect` all below a folder, ``tables``
shows them, ``paper`` and ``paper_comparison`` put them beside the figures of the FMP paper.
"""
