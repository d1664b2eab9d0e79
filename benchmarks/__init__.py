"""Programs that measure: minilpt beside its peers (`peers`), and where constants come from (`fit_erfc`)."""
