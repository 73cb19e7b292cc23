"""``report.html``, one self-contained page about a finished run: :func:`page.write_report` makes it from the files of a result
folder; ``findings`` has its words, ``strips`` its feature maps, ``figures`` its charts, ``pictures`` its images.
"""
