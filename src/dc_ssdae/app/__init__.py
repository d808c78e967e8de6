"""The interactive page of `dc-ssdae app`: what it computes, and its layout."""
