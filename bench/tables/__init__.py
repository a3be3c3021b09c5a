"""Tables of published pages, made from the rows in `bench/`."""
