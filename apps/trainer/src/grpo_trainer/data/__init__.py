"""Problems become prompts."""
