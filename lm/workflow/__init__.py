"""The grid as a Snakemake workflow: jobs that each write a record, and their summary. See README.md."""
