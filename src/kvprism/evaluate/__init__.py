"""Quality as it will be used: task -> records, one per document and arm -> rows, comparisons."""
