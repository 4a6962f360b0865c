"""What separation and pfs take apart."""
