"""Running a model: sessions, the two-graph model, decoding and sampling."""
